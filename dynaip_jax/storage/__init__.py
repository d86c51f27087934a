"""What lies on disk: folders, tensor files, bundles, adapters."""
