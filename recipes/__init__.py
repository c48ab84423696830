"""The shipped recipes, installed as the package llmkd_recipes; `llmkd recipes` lists them and `llmkd init` copies one."""
