"""What happens on a cluster before a job trains: its script rendered, its nodes checked."""
