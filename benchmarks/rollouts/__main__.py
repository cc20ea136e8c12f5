from benchmarks.rollouts import main

main()
