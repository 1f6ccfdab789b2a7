"""What a run tells: to the console, to its folder and to W&B, on the main rank; nothing on the others."""
