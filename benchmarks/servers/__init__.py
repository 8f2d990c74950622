"""What the service is compared with: servers that do less, or do it the usual way."""
