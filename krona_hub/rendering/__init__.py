"""Tables, text and HTML reports."""
