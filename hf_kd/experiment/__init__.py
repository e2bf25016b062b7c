"""From parsed arguments to finished runs: the plan, its execution and its continuation."""
