"""The quickstart: real pretrained parts, real pictures, every training stage and an honest report in one command."""
