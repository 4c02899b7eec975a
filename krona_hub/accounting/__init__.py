"""Parameter counts of adapters: planned ones, before training, and existing files. Torch-free."""

from krona_hub.accounting.counting import Accounting as Accounting
from krona_hub.accounting.counting import account as account
from krona_hub.accounting.counting import account_file as account_file
