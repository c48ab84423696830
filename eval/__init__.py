"""Evaluation, comparison and reports of finished runs. Installed as `llmkd_eval`. In llmkd only the command line imports it."""
