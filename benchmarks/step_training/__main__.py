from benchmarks.step_training import main

main()
