"""The recipes' configs, installed as `mmjax.configs`."""
