"""Ray: join a cluster, embed and evaluate with actors, train with workers, submit a job and follow it."""

WORDS = """\
ray:
  address=http://HEAD:8265                   the dashboard of the cluster (or auto, ray://HEAD:10001)
  verb=run                                   or embed, train, evaluate: only that stage
  dir=.  exclude=[big,*.bin]                 directory that is copied to the job, and files in it to leave out
  name=…  cpus=…  gpus=…                     name of the job; CPUs and GPUs reserved for its driver
  env.NAME=…  pip=[…]  conda=…  image_uri=…  runtime_env=FILE.yaml      environment of the job
  train.ray.…  embed.ray.…  evaluate.ray.…   config keys with the numbers of ranks and actors"""
