"The training of a model: the loop and its models, checkpoints, speed, forecasts, several processes."
