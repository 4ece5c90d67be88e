"""The report: everything that is known of a run and its exported files as one HTML page. It loads nothing."""
