"""Evaluation and comparison of runs; installed as `llmkd_eval`. It may import llmkd, and only llmkd's command line loads it."""
