"""`fundus`: photographs of retinas, by disease, with camera and patient.

A folder or zip of images in one folder a class, with a table `metadata.csv`
of the columns file, label, source (the camera), patient_id and eye (OD is the
right eye, OS the left): the form of the CFP-OS data.
"""

from data_prep import image_folder, trees

GROUP = "patient_id"


class PsgFundus(image_folder.PsgImageFolder):
  """Splits 80/20 by patient and class; images without a patient stand alone."""

  OPTIONS = image_folder.PsgImageFolder.OPTIONS - {"group"}
  DESCRIPTION = "Fundus photographs by disease, with camera, patient and eye."
  NEEDED_COLUMNS = ("source", GROUP, "eye")

  def group(self) -> str:
    """Returns the column of the patients."""
    return GROUP

  def advice(self) -> str:
    """Returns what has to be beside the images."""
    return (
      f" with {trees.METADATA_FILE} of the columns file, label,"
      f" {', '.join(self.NEEDED_COLUMNS)}"
    )
