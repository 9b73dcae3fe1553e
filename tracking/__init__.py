"""MLflow: runs of sweeps and studies, and the registry of adapters. The only room that imports mlflow."""
