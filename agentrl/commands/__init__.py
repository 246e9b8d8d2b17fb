"""What commands do between the command line and the rooms below: run a policy, show episodes, build and serve indexes."""
