"""What turns an architecture into a measurement: training a child, or looking it up."""
