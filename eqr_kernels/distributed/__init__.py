"""More puzzles than fit in memory, on more machines than one: tables of any size in, Parquet in shards out.

`reading` cuts the input into units of rows; a `job` says what is made of each (`answers` or `recordings`); one of the
`engines` runs it over the units (`Local` in this process, `on_ray` on the machines of a Ray cluster), and `shards`
writes what comes as it comes, so that the same run goes on after a stop. A row's result depends on the row and on the
job alone, so all engines write the same bytes.

`online` is apart from these: the HTTP app of an Engine, in replicas that Ray Serve runs.

pyarrow and Ray are optional dependencies, which `optional` imports when they are needed.
"""
