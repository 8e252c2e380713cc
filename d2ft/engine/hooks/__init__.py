"""What a run does between its steps, beside what Detectron2's own hooks do."""
