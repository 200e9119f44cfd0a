"""The families of questions: each function lists one kind's questions, as texts with their only right answers."""
