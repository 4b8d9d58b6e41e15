"""What a configuration would cost, by arithmetic: parameters, memory, communication, time."""
