"""Ray: join a cluster, embed on actors, train on workers, submit a job and follow it."""

WORDS = """\
ray:     address=http://HEAD:8265 verb=run (or train, embed) dir=. (what the job gets a copy of) exclude=[big,*.bin]
         name=… cpus=… gpus=… (for the driver) env.NAME=…; ranks and actors are train.ray.… and embed.ray.…"""
