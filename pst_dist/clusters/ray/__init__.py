"""Ray: join a cluster, embed on actors, train on workers, submit a job and follow it."""
