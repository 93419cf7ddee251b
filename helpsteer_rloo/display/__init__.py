"""What is seen of a run while it goes on: lines and tables, the live block, and the report kept up to date."""
