"""Big files without big memory: headers parsed by hand, tensors read as needed, writes that are whole or absent."""
