"""Big files without big memory: headers parsed by hand, tensors read as they are needed, writes that are whole or absent."""
