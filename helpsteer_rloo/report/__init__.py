"""One page that shows a run: from the files of its directory to `report.html`. It loads no torch."""
