"""What a run's folder holds, read for people and programs while the run is written or after it. Nothing here writes into the folder.

    folder    the files, each of them possibly missing, unfinished or damaged     text     texts and numbers for a reader
    readings  trajectories with their verdicts and gold answers
    run       all of it as one object, for programs                                rows     trajectories as rows of data sets
    progress, status, show                                                         what the commands of these names print

Importing any of it loads neither torch nor transformers.
"""
