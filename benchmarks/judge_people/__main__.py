from benchmarks.judge_people.measure import main

if __name__ == "__main__":
    main()
