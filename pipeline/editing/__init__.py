"""Pictures made from pictures: input pictures, masks, second rounds, ControlNets."""
