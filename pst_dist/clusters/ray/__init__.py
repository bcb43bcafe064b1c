"""Ray: join a cluster, embed and evaluate with actors, train with workers, submit a job and follow it."""

WORDS = """\
ray:     address=http://HEAD:8265 (or auto, ray://HEAD:10001) verb=run (or embed, train, evaluate) dir=. (directory that
         the job gets a copy of) exclude=[big,*.bin] name=… cpus=… gpus=… (for the driver) env.NAME=… pip=[…] conda=…
         image_uri=… runtime_env=FILE.yaml; train.ray.…, embed.ray.…, evaluate.ray.… set numbers of ranks, actors"""
