"""The console command ``mctf``."""
