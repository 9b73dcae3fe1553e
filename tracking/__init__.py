"""MLflow: runs of sweeps and the registry of adapters. The only room that imports mlflow."""
