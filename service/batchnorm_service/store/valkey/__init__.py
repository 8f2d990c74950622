"""Layers in Valkey or Redis: one server, one with replicas, or a Cluster."""
