"""Ray: join a cluster, embed with actors, train with workers, submit a job and follow it."""

WORDS = """\
ray:     address=http://HEAD:8265 (or auto, ray://HEAD:10001) verb=run (or train, embed) dir=. (directory that the job
         gets a copy of) exclude=[big,*.bin] name=… cpus=… gpus=… (for the driver) env.NAME=… pip=[…] conda=…
         image_uri=… runtime_env=FILE.yaml; train.ray.… and embed.ray.… set the numbers of ranks and actors"""
