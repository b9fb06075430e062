"""vc2: from raw web data to a trained and scored VideoCrafter2, as one reproducible DAG."""
