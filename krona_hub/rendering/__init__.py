"""Tables, words and HTML reports."""
