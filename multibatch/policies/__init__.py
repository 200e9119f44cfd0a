"""How many sequences may run, and how many prompt tokens a step takes: each policy a small file of plain numbers.

The scheduler asks every policy before each step and tells it afterwards how the step went; what they decide is
combined as the minimum. All of it runs the same in the engine and in the simulator.
"""
