"""What a layer's delta looks like: its sizes, and its normal forms."""
