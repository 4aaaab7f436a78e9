"""What a model still knows, before and after an edit: metrics, evaluation by group, comparison, report."""
