"""Store in Valkey or Redis: a single server, a server with replicas, or a Cluster."""
