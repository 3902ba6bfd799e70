"""Policies side by side on one plant: loads, runs, hindsight searches, figures and their page."""
