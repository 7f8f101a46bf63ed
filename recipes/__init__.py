"""Recipes for results of this project, to run again."""
