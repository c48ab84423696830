"""Evaluation, comparison and reports of finished runs. Installed as `llmkd_eval`. Of llmkd only the command line imports it."""
