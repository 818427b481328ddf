"""What knows neither machine learning nor this project: errors, files, trees, processes."""
