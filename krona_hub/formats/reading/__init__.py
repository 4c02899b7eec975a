"""Read an adapter file: plan, decode, describe."""
