"""Pages and charts: what was found, as pictures. Knows neither Ray nor MLflow."""
