"The paper's experiments: methods, the ledger of runs, tables and figures, the runner, the benchmark."
