from benchmarks.judges.agreement import main

main()
