"""What a run leaves behind and how people read it: metrics, progress, summary, HTML report, printed transcripts."""
