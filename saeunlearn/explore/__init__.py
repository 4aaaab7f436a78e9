"""The explorer's library side: what a page on a run directory shows, computed as JSON-able dicts.

A room between pipeline and app: explore knows pipeline, evaluation, methods and features; only the app knows explore.
index: statistics and examples of every feature · opened: an open run directory · feature, compare, steer: the views.
"""
