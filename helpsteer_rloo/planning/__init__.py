"""What a run will need, computed from sizes before anything is loaded: memory by stage, operations, time."""
